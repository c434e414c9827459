"""LayerLens over HTTP: a queue of jobs with its state in SQLite, each job in a process of its own, and a client."""
