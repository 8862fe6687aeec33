"""Captions by people.

What belongs here: which caption a poster has from people (`people`), the file `captions.csv` as
spreadsheets write it (`csv_file`), and captions that are written or taken back from a page
(`edits`). What does not: captions by BLIP, and the table of both (`captioner`).
"""
