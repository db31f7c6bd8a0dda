"""The only place that knows a trainer. Importing it imports none."""
