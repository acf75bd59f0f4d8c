"""What is made of results files: pictures, a page, the README's tables, a comparison. It measures nothing."""
