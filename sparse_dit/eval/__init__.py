"""Quality and speed reports: what a plan costs in likeness and saves in seconds."""
