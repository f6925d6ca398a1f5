-- Sends radiographs to the DICOM node, and nothing that came from there: results must not go round in circles.
function OnStoredInstance(instanceId, tags, metadata, origin)
  local modality = tags['Modality']
  local radiograph = modality == 'CR' or modality == 'DX' or modality == 'DR'
  if radiograph and origin['RemoteAet'] ~= 'CXRRAY' then
    SendToModality(instanceId, 'cxr-ray')
  end
end
