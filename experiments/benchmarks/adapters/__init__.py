"""One script for every rival, run by the rival's own interpreter."""
