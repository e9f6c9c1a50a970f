"""What runs inside the sandbox: both ends of the conversation between tests and program.

These modules are bound into the sandbox and run there by a bare interpreter (``-P -s -S``), so they
import one another relatively, take nothing from outside this folder but the standard library, and
little of that: importing ``typing`` would double the time that a run takes to start.

``launcher`` is process 1 of a sandbox and sets its limits. ``checker`` runs the tests and decides,
with :class:`~.remote.Remote` objects in place of the program's; ``candidate`` runs the program and
answers. ``wire`` carries their messages, ``values`` what may be in them.
"""
