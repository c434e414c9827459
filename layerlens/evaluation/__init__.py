"""Does the chosen allocation win? Paired fine-tunes of one model under many allocations, and what they say.

``stacks`` holds many arms over one frozen model, exactly; ``training`` trains them and searches every arm's learning
rate on validation samples; ``results`` keeps every run as a JSON line and makes paired intervals of them;
``study_report`` shows them. ``study_task`` and ``study`` say where each arm's rank goes. `layerlens evaluate` is
``from_config``; what only this project's own study needs is in ``benchmarks/evaluation``.
"""
