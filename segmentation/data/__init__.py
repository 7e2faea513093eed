"""Data sets made here, in the layout of ADE20K."""
