"""The quality study: every criterion, the parts of preset ``fast`` one by one, and compensation, on one decoder."""
