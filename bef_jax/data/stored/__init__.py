"""The files of a store: writes them, reads rows of them, and checks what they say of themselves."""
