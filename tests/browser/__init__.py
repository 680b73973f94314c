"""The feature pages in a real headless Chromium, opened from disk."""
