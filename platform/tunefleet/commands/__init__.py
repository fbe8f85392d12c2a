"""What commands do that look at runs from outside: list them, fetch them."""
