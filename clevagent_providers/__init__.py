"""What providers' APIs look like, for every adapter that reads their requests, answers and errors. No SDK is imported."""
