"""What people look at: tables in the terminal, JSON, CSV, figures, and one HTML page that needs nothing else."""
