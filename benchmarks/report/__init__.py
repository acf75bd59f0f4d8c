"""What is made of results files: pictures, pages and their tables, a comparison. It measures nothing."""
