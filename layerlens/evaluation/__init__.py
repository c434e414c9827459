"""Does the chosen allocation win? Paired fine-tunes of one model under many allocations, and what they say.

``lora_stack`` trains many arms over one frozen model at once, exactly; ``sweep`` chooses every arm's learning rate on
validation samples and runs the seeds; ``results`` keeps every run as a JSON line; ``analysis`` and ``study_report``
turn the lines into paired intervals, tables and plots. ``baselines`` and ``adalora`` are others' rules of where rank
goes.
"""
