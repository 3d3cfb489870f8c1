"""A run of several processes: how they join, and how replicas exchange steps.

JAX connects the processes, moves the arrays and notices when a process dies.
This room turns that into a sentence and an exit status, and checks that all
processes run the same thing. It also lets replicas, which are not connected,
share out the directions of a step (experimental).
"""

__all__ = ()
