"""The processes of a live run: started, watched, ended; what runs in each. Imports fd, tcp and the model."""
