"""What runs inside the sandbox.

These modules are handed to a bare interpreter (``-P -s -S``) there, so they import one another
relatively, take nothing from outside this folder but the standard library (``session`` pytest too),
and little of that: importing ``typing`` would double the time that a server takes to start.

``server`` is process 1 of a sandbox and forks each run, which ``isolate`` puts into namespaces and
limits. ``checker`` runs tests in a process of their own and decides, with
:class:`~.remote.Remote` objects in place of the program's; ``candidate`` runs the program and
answers; ``wire`` carries their messages, ``values`` what may be in them. ``runner`` has pytest run
both in one process, ``session``. ``alone`` does either in a single script, for an endpoint.
"""
