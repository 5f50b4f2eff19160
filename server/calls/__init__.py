"""What a call asks for, who makes it, what it is answered, and what is recorded of it."""
