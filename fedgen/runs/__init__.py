"""A run: what is asked, what happens, what it leaves behind."""
