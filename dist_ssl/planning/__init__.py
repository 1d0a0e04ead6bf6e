"""Before a run: what it will cost, by formulas (`planner`), and whether a machine can run it (`doctor`)."""
