"""How fast it is, and whether it is right: measured against dense attention on the machine at hand."""
