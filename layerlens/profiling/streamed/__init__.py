"""Profiling a model whose weights stay on disk: one block is in memory at a time.

Design:
a) ``parts``: the model's own ``forward`` is run with its blocks replaced. What comes before the first block (the front)
   puts out the first activations and every argument that the blocks get; what comes after the last one (the tail) is
   given the last activations. Nothing is known of any architecture.
b) ``residency``: weights come by plain reads into memory that is used again; a thread reads those of the next part.
c) ``on_disk``: activations [batch, tokens, features] between the blocks of all batches, in a memory map; what is done
   is written after every block, and an interrupted profile goes on there.
d) ``forward``: each block once for all batches forward. ``measure_streamed``: then each once for all batches backward,
   where it is run again with the taps of ``profiling.capture`` on it. So the weights are read twice, however many
   batches there are.

The sums are those of ``measure``, over the same batches in the same order: the results have the same bits.
"""
