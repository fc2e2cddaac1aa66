"""The output of a run: tables on the screen, its scores, its record, its model card."""
