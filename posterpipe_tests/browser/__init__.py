"""Pages as people see them: a real Chromium, driven by Playwright.

What belongs here: tests that look at a page, click and type. What does not: what the pages are
made from (tests of `core` and `defs`).
"""
