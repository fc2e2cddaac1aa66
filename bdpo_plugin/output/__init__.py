"""What a run leaves behind: tables on the screen, its scores, its record, its model card."""
