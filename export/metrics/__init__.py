"""How alike two pictures are: PSNR, SSIM and LPIPS, without a network, and how sure their means are."""
