"""The figures of a run joined: verdict, text, charts and page."""
