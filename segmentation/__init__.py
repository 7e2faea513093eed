"""ADE20K semantic segmentation with the zoo, through mmsegmentation."""
