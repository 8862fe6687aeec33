"""Posters as people put them into folders and buckets.

What belongs here: what lies there (`listing`), whether it has changed since it was read
(`arrivals`; behind its date, `rereading`), its files as rows with a status and a reason
(`landing`), which of them look alike (`near_duplicates`), and what the dataset holds of it
(`inventory`). What does not: turning posters into training images (`images`), and their captions
(`captions`).
"""
