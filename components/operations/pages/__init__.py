"""The pages of runs: tables, plots as SVG, and templates. No page loads anything, not even a file beside it."""
