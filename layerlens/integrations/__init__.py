"""The rooms that know how torch, torchvision, transformers, ultralytics and PEFT models are built and named."""
