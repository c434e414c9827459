"""What every stage may need: atomic files, threads, progress, logging, and checks of what callers hand in."""
