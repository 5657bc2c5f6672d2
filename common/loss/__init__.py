"""What training lowers and what evaluation reports."""
