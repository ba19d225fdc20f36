{{/* Where the model comes from, and where volumes are mounted. */}}
{{- define "baton.checkModel" -}}
{{- $model := .Values.model -}}
{{- $known := list "smollm2-135m-instruct" -}}
{{- if and (eq $model.source "embedded") (not (has $model.embedded.name $known)) (not (hasPrefix "/" $model.embedded.name)) -}}
{{- fail (printf "model.embedded.name is %q, which is no embedded model: there is %s; one that images of your own carry is named by its absolute path, any other by another model.source" $model.embedded.name (join ", " $known)) -}}
{{- end -}}
{{- if and (eq $model.source "pvc") (not $model.pvc.claimName) -}}
{{- fail "model.source is pvc; set model.pvc.claimName to the claim that holds the model" -}}
{{- end -}}
{{- if and (eq $model.source "hostPath") (not $model.hostPath.path) -}}
{{- fail "model.source is hostPath; set model.hostPath.path to a folder that every node has" -}}
{{- end -}}
{{- if eq $model.source "hostPath" -}}
{{- if or (not (hasPrefix "/" $model.hostPath.path)) (has ".." (splitList "/" $model.hostPath.path)) -}}
{{- fail (printf "model.hostPath.path is %q: the kubelet mounts an absolute path of the node, without .. in it" $model.hostPath.path) -}}
{{- end -}}
{{- end -}}
{{- if has ".." (splitList "/" (default "" $model.path)) -}}
{{- fail (printf "model.path is %q: it is a file or folder inside of the volume, so without .. in it" $model.path) -}}
{{- end -}}
{{- if and (eq $model.source "image") (not $model.image.reference) -}}
{{- fail "model.source is image; set model.image.reference to the OCI image that holds the model" -}}
{{- end -}}
{{- if and (eq $model.source "huggingFace") (not (and $model.huggingFace.repo $model.huggingFace.revision)) -}}
{{- fail "model.source is huggingFace; set model.huggingFace.repo and model.huggingFace.revision (a commit, so that all pods hold the same weights)" -}}
{{- end -}}
{{- if eq $model.source "huggingFace" -}}
{{- include "baton.checkHub" $model.huggingFace -}}
{{- end -}}
{{- end -}}

{{/* Names of the model hub: https://huggingface.co/docs/huggingface_hub/package_reference/utilities
     (validate_repo_id). (dict "repo" … "revision" …) */}}
{{- define "baton.checkHub" -}}
{{- $part := "[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?" -}}
{{- if or (not (regexMatch (printf "^(%s/)?%s$" $part $part) .repo)) (regexMatch "--|[.][.]|[.]git$" .repo) -}}
{{- fail (printf "model.huggingFace.repo is %q, which names no model of the hub: OWNER/NAME, as in HuggingFaceTB/SmolLM2-135M-Instruct, and no URL" .repo) -}}
{{- end -}}
{{- if not (regexMatch "^[0-9a-f]{40}$" .revision) -}}
{{- fail (printf "model.huggingFace.revision is %q, which is no commit: the hub's 40 hexadecimal digits of one; what a branch or a tag names may change between the downloads of two pods" .revision) -}}
{{- end -}}
{{- end -}}

{{/* What a mounted volume would hide, and no container starts without, in images made from deploy/.
     (the values' paths) */}}
{{- define "baton.checkPaths" -}}
{{- range $name, $given := . -}}
{{- $path := clean $given -}}
{{- if has ".." (splitList "/" $given) -}}
{{- fail (printf "paths.%s is %q: no volume is mounted at a path with .. in it; write where that is" $name $given) -}}
{{- end -}}
{{- if or (has $path (list "/" "/etc" "/home" "/opt" "/usr" "/usr/local" "/var")) (regexMatch "^/(bin|boot|dev|lib|lib32|lib64|libx32|proc|sbin|sys|usr/(bin|lib|lib64|sbin)|usr/local/(bin|lib)|opt/baton)(/|$)" $path) -}}
{{- fail (printf "paths.%s is %s: the volume mounted there would hide what the image has in it, and no container would start; choose a folder of its own" $name $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}
