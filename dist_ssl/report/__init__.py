"""The report: one self-contained HTML page of a run, or of several runs side by side. No script, no outside resource."""
