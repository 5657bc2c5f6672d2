"""What crosses between site and coordinator: frames, their records, the envelope around them."""
