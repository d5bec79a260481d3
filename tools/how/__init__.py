"""The pictures of docs/how_it_works.md, a module for each subject; drawn by tools/draw_how_it_works.py."""
