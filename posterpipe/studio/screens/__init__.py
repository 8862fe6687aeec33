"""The pages of the studio, one a file; Streamlit runs them.

What belongs here: what is asked and shown on a page. What does not: anything that could be tested
without a page (the rooms beside this package).
"""
