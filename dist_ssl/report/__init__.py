"""The report: one self-contained HTML page of a run or of several side by side. No script, no outside resource."""
