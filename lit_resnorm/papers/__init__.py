"""The papers, reproduced: each figure and table an item that judges itself."""
