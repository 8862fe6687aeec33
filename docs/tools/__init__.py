"""What makes the parts of the documentation that people should not have to write.

What belongs here: blocks that follow from the code (`pages`), the reference (`reference`), pictures
of the running product (`screenshots`). What does not: guides, which people write.
"""
