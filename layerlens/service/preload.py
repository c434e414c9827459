"""What a job that only optimises needs, imported once by the process from which such jobs are forked.

A fork with this in memory starts in some 20 ms instead of seconds. Nothing here may start threads.
"""

import layerlens.optimization.cpsat
import layerlens.pipeline
import layerlens.service.worker  # noqa: F401
