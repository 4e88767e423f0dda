"""What the commands ``md``, ``relax``, ``vib`` and ``scan`` do, on the integrators and optimisers of ASE."""
