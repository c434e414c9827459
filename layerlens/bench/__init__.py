"""What only benchmarks use: kernels beside their peers, instances of the solver, paired timing; `layerlens bench`."""
