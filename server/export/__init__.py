"""An adapter as files, in every format, and sealed."""
