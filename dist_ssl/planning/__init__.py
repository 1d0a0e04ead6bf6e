"""Before a run: what it will cost, by formulas (`estimate`), whether a machine can run it (`doctor`), and whether there
is a mistake that would end it (`before_start`)."""
