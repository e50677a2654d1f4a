"""Folders of models: packed ones in several libraries' formats, and merged ones."""
