"""Many films from one list of jobs: `python -m headless batch`."""
