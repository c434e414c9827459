"""The rooms that know how torch, transformers and PEFT models are built and named."""
