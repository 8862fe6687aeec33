"""The studio: its queue, drawing, captions, scores, and its pages without a browser."""
