"""Reading pictures and what is known of them."""
