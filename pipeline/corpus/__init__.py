"""Text in, clean documents out: readers, cleaning, deduplication, splits. Needs neither torch nor mlflow."""
